"""Looking inside trained models: edits of named values, and router decisions taken apart. Arrays in, arrays out."""
