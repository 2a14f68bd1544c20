"""What recipes are made of: free functions, no trainer."""
