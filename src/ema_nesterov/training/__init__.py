"""The trainer: `run.run(cfg)` is one run, `loop.train` its loop."""
