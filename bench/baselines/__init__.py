"""What every op is raced against: published formulas in plain torch, and the best torch that we could write.

All of them run on the device of their arguments. The better a baseline, the more a ratio to it says.
"""
