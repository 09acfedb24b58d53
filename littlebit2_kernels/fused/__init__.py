"""What surrounds packed layers, in one call with them: RMS normalization, and whole MLPs."""
