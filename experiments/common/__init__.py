"""What every program needs: flags in, one-line errors out, files, processes."""
