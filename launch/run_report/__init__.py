"""What ``launch.report`` shows of jobs: what their folders say, figures of it, the page."""
