"""Search spaces: what is searched, apart from how."""
