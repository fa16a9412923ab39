"""The built-in phantom: subjects that never lived (`body`), their images (`render`) and their reports (`report`)."""
