"""What contenders talk to: each in a process of its own that says where it listens, in one line of JSON."""
