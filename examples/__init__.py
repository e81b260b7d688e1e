"""What a user can run and copy."""
