"""The errors a person at the terminal can meet; each says the thing, what was found and what is possible, in one
line."""

from __future__ import annotations


class LocalMoeError(Exception):
    """Anything wrong outside the program itself: `cli` prints the message and exits with 2."""


class FileFormatError(LocalMoeError):
    """A model file or folder is broken, truncated or hostile: the message names the file and the place."""


class ReadError(LocalMoeError):
    """A model file that was sound cannot be read any more: the message names the file, the place and what the system
    said."""


class UnsupportedError(LocalMoeError):
    """A file is sound but asks for something that is not implemented: the message names the key and its value."""


class TokenizerError(LocalMoeError):
    """A vocabulary that cannot be built, or text that it cannot carry."""


class TemplateError(LocalMoeError):
    """A chat template that does not parse, raises, or grows beyond its bounds."""


class SettingError(LocalMoeError):
    """A setting, flag or slash command with a value outside its range."""


class DeviceError(LocalMoeError):
    """A device that is not there, or an input (context, memory) that it cannot hold."""


class ContextError(DeviceError):
    """A prompt that is longer than the context."""


class ConversationError(LocalMoeError):
    """A saved conversation that is not there, is open elsewhere, or is damaged beyond reading."""
