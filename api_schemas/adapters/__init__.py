"""Other tools' own forms of an answer. What is in here runs on the side of the tool."""
