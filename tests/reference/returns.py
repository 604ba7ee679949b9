"""Returns, one step at a time, as the formula in docs/algorithm.md is read aloud."""


def slow_return(rewards, values, discount, n, t, to_play=None, first=0):
    """z_t: rewards from k = `first` on, then the bootstrap; all from the view of the player who moves at t."""
    num_steps = len(rewards)
    total = 0.0
    k = 0
    while k < n and t + k < num_steps:
        if k >= first:
            total += discount**k * view(to_play, t, t + k) * float(rewards[t + k])
        k += 1
    return total + discount**k * view(to_play, t, t + k) * float(values[t + k])


def view(to_play, viewer, owner):
    """+1 where both steps belong to one player, else −1: what is good for one is bad for the other."""
    return 1 if to_play is None or to_play[viewer] == to_play[owner] else -1
