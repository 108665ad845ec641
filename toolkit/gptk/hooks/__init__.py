"""Every hook on one page, and the contracts that plug-ins fill in."""
