"""Files, caches, memory, devices and interrupts: what the operating system gives."""
