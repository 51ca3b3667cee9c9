"""What tests and benchmarks share: swarms to run on, slow or broken links, attackers."""
