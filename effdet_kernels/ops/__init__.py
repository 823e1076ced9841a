"""The ops: one folder each, same name as its C++ folder in csrc/."""
