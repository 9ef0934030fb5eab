"""The operations in plain torch: for CPUs, Macs and machines without Triton."""
