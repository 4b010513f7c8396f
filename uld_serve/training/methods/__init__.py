"""The unlearning methods, one file each with its formula. See method.py for what a method is."""
