"""What several test modules share. What benchmarks use, too, is in `tools/testing`."""
