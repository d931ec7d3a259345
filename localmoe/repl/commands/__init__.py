"""The slash commands: one decorated function each, by subject; importing this fills the table."""

from localmoe.repl.commands import branches, general, models, prompts, saved, weights
from localmoe.repl.commands.table import COMMANDS, execute

__all__ = ["COMMANDS", "branches", "execute", "general", "models", "prompts", "saved", "weights"]
