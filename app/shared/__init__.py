"""What the server and the worker both use; the only part of `app` that the worker imports."""
