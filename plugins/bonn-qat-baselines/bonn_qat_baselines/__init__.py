"""Baselines for bonn-qat, one scheme a file; each uses what any plugin may use."""
