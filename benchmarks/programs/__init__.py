"""Whole programs that contenders start, each in a process of its own, where the start itself is what is measured."""
