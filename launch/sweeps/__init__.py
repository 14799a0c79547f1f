"""What ``launch.sweep`` is made of: the runs it plans, their processes, what came of them."""
