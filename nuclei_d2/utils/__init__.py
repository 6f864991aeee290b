"""Small helpers that every part of the package shares: errors, files, hardware."""
