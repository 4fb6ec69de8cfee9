"""Looking inside trained models: edits, decisions taken apart, dictionaries. Arrays in, arrays out."""
