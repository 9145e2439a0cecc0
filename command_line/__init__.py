"""What all programs share on the command line: flags made from settings, and how a program ends."""
