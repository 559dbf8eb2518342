"""What goes wrong with model folders."""


class FolderError(ValueError):
    """A model folder that cannot be read, written, expressed or trusted: names the file or feature, and the mend."""
