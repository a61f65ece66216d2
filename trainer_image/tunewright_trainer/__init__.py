"""The trainer: a supervisor without torch and the worker it starts."""
