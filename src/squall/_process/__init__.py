"""The process: its threads, compiled helpers, replayed GPU work and progress."""
