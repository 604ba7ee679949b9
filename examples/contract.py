"""Five plain functions learn a walk with planning, acting and training alone.  Usage: contract.py [SEED]"""

import sys

import numpy as np
from torch import arange, cat, eye, manual_seed, nn, ones, optim, set_num_threads, stack, tanh, tensor, zeros

from distributed_muzero import Step, acting, planning, training
from distributed_muzero.environments.chain import ChainEnvironment

set_num_threads(1)  # small networks are fastest so
manual_seed(seed := int(sys.argv[1]) if len(sys.argv) > 1 else 1)
K, rng, sizes = 10, np.random.default_rng(seed), ((10, 32), (35, 32), (35, 1), (32, 1), (32, 3))
nets = [nn.Sequential(nn.Linear(i, 64), nn.ReLU(), nn.Linear(64, o, bias=False)) for i, o in sizes]
heads = [nn.init.zeros_(net[2].weight) for net in nets[2:]]  # reward, value and policy start from 0
adam = optim.Adam([weight for net in nets for weight in net.parameters()], lr=5e-4)
five = (  # h, g_r, g_s, f_v, f_p
    lambda o: tanh(nets[0](o.flatten(1))),
    lambda s, a: nets[2](cat([s, eye(3)[a]], 1)),
    lambda s, a: tanh(nets[1](cat([s, eye(3)[a]], 1))),
    lambda s: nets[3](s),
    lambda s: nets[4](s),
)
envs = [ChainEnvironment(start=cell) for cell in range(1, 9)]  # the left end pays 0.2, the right end 1
games: list = []  # of each: o_t, and π, a, z, u of t … t+K; past the end, random actions and zeros
for turn in range(7):
    returns = [sum(s.reward for s in acting(env, *five, temperature=0, noise=False)) for env in envs]
    _, policy = planning(*five, eye(10)[3:4], ones(3))
    print(f"turn {turn}: mean return {np.mean(returns):.2f}, policy at cell 3 {policy.numpy().round(2)}")
    for env in envs * 4:
        past = [Step(zeros(10), zeros(3), int(a), 0.0, 0.0) for a in rng.integers(3, size=K)]
        o, pi, a, u, _ = zip(*acting(env, *five, rng=rng), *past, strict=True)
        z = [sum(0.99**k * reward for k, reward in enumerate(u[t:])) for t in range(len(u))]
        at = arange(len(o) - K)[:, None] + arange(K + 1)
        rows = stack(o)[at[:, :1]], stack(pi)[at], *(tensor(x)[at] for x in (a, z, u))
        games += [] if env.truncated else [rows]  # a game cut by the time limit has no return yet
    memory = [cat(column) for column in zip(*games, strict=True)]
    for picks in rng.integers(len(memory[0]), size=(100, 64)):
        o, pi, a, z, u = (column[picks] for column in memory)
        training(o, pi, a, z, *five, target_rewards=u, optimizer=adam)
