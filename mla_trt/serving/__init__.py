"""Serves many requests at a time with one session: `loop` decides what each step runs, `runner` gives it a thread."""
