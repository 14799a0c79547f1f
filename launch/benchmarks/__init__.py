"""Benchmark cases: each measures one promise of speed or memory."""
