"""Many runs over one model: admission, memory, joined passes."""
