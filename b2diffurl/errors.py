"""What a user can mend: said in one line that names the field or file and the way out."""


class UserError(Exception):
    """Something the user can mend; the message is one line that names the field or file and the way out."""


class SharedError(UserError):
    """A UserError that every process of a step raises; the first one says it."""
