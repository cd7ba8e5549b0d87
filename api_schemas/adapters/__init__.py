"""Answers in the formats of other tools. This code runs in the process of the tool."""
