"""Speed, measured on the machine at hand, and how it compares."""
