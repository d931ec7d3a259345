"""The chat in the terminal: loop, commands, input and drawing; the only package that a session never knows about."""
