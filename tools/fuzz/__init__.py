"""Every parser of bytes from disk, fed what coverage says is new: `make fuzz`."""
