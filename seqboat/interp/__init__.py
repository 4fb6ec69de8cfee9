"""Looking inside trained models: edits, decisions taken apart, dictionaries, codes scored. Arrays in, arrays out."""
