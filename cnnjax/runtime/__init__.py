"""What every command shares: the backend, command lines, work directories, signals, progress."""
