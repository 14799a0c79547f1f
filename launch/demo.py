"""The demo: meta-train, compare with swept baselines, say plainly how it went.

make demo
"""
