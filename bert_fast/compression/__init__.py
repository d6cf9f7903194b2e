"""What lossy messages and compressed optimizer state are made of: error feedback, and the formats that it makes up for."""
