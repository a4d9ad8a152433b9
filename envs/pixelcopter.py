"""PixelCopter-v0: fly a copter, 2 x 2 pixels, through a scrolling cave. The Pixelcopter of the PyGame Learning
Environment (PLE, Tasfi 2016), which the Hugging Face Deep RL course, unit 4, uses, written afresh in NumPy.

Two actions, 0: nothing (it falls), 1: up. The cave's walls are columns 4 pixels wide; in it stand blocks of 4 x 9
pixels, one at a time. Whatever is touched ends the episode, as does leaving the band between 1/8 and 7/8 of the
screen's height. Rewards: +1 for each column that leaves the screen (one in 6.25 steps) and for each block that is
passed, and -1 for the crash, as PLE's manual has it. PLE's code says -5 unless told otherwise, which is what the
course's students were measured with: crash_reward=-5 gives that, 4 less in each episode that ends by a crash.

The observation, in PLE's pixels (y points down) and unscaled, in the order of PLE's manual:
  y of the copter, its velocity in pixels per step, distance to the floor, distance to the ceiling,
  x distance to the next block, "top" and "bottom" of that block
where the last two are PLE's: y of the block's centre, and 9 pixels below it, though the block reaches from 4 above
its centre to 5 below.

PLE plays on without end; here 1,000 steps (33 seconds of play) are a time limit.
"""

import gymnasium as gym
import numpy as np

SIZE = 48  # pixels, width and height
DT = 1000 / 30  # milliseconds per step
SPEED = 0.0004 * SIZE  # pixels per millisecond
CLIMB, FALL = -0.875 * SPEED * DT, 0.09 * SPEED * DT  # what a step adds to the velocity; y points down
FRICTION = 0.99  # of the velocity, per step
PLAYER_X, PLAYER_HEIGHT = 16, 0.05 * SIZE
COLUMN, BLOCK_HEIGHT = 4, 9  # width of columns and blocks
GREEN = 120, 240, 80
WALL = SIZE / 4  # from the middle of the cave to its ceiling and floor


class PixelCopter(gym.Env):
    """Observations [7] float32, in pixels; actions 0 (nothing) and 1 (up)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012, it is Gymnasium's
    observation_space = gym.spaces.Box(-SIZE, 2 * SIZE, (7,), np.float32)  # wider than any play
    action_space = gym.spaces.Discrete(2)

    def __init__(self, crash_reward=-1.0, render_mode=None):
        self.crash_reward, self.render_mode = crash_reward, render_mode

    def columns(self, start):
        """Four screens of columns from x = start on: [2, 48], x and y of their centres, y being a noisy sine."""
        x = np.arange(start, start + 4 * SIZE, COLUMN) + COLUMN / 2
        frequency = 4.5 / SIZE + self.np_random.uniform(-0.01, 0.01)
        y = SIZE / 2 + SIZE / 8 * np.sin(frequency * x + self.np_random.uniform(0, 0.5, len(x)))
        return np.stack([x, np.trunc(y)])

    def block(self):
        """A block off screen to the right, [x, y] of its centre."""
        return self.np_random.integers([SIZE, SIZE // 4], [SIZE * 3 // 2, SIZE * 3 // 4]).astype(float)

    def obs(self):
        middle = self.cave[1, self.touched()][0]  # of two columns the left one, as in PLE
        x, y = next(block for block in self.blocks if block[0] > PLAYER_X)
        floor, ceiling = middle + WALL - self.y, self.y - (middle - WALL)
        obs = [self.y, self.velocity, floor, ceiling, x - PLAYER_X, y, y + BLOCK_HEIGHT]
        return np.array(obs, np.float32)

    def touched(self):
        """Which columns share a pixel with the copter's: [columns], one or two are. PLE collides whole pixels."""
        return np.abs(np.trunc(self.cave[0]) - PLAYER_X) < COLUMN / 2 + 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.y, self.velocity = SIZE / 2, 0.0
        self.blocks, self.cave = [self.block()], self.columns(0)
        return self.obs(), {}

    def crashed(self):
        for x, y in self.blocks:  # whole pixels, the copter two of them: [y - 1, y + 1), a block [y - 4, y + 5)
            if abs(int(x) - PLAYER_X) < COLUMN / 2 + 1 and -6 < int(y) - int(self.y) < 5:
                return True
        middle = self.cave[1, self.touched()]
        hits = (self.y - PLAYER_HEIGHT <= middle - WALL) | (self.y >= middle + WALL)
        return hits.any() or not SIZE / 8 <= self.y <= SIZE * 7 / 8

    def step(self, action):
        self.velocity = (self.velocity + (CLIMB if action else FALL)) * FRICTION
        self.y += self.velocity
        self.cave[0] -= SPEED * DT
        for block in self.blocks:
            block[0] -= SPEED * DT
        crashed, reward = bool(self.crashed()), 0.0
        if len(self.blocks) == 1 and self.blocks[0][0] <= PLAYER_X:  # the next appears when this one is passed
            reward += 1
            self.blocks.append(self.block())
        self.blocks = [block for block in self.blocks if block[0] > -COLUMN]
        gone = self.cave[0] <= -COLUMN
        reward += float(gone.sum())
        self.cave = self.cave[:, ~gone]
        if self.cave.shape[1] <= 13:  # what a screen shows
            self.cave = np.concatenate([self.cave, self.columns(SIZE)], 1)
        return self.obs(), reward + self.crash_reward * crashed, crashed, False, {}

    def render(self):
        """As PLE draws it, every pixel enlarged to 8 x 8."""
        screen = np.zeros((SIZE, SIZE, 3), np.uint8)
        for x, middle in self.cave.T.astype(int):
            columns = slice(max(x - 2, 0), max(x + 2, 0))
            screen[: middle - SIZE // 4, columns] = screen[middle + SIZE // 4 + 2 :, columns] = GREEN
        for x, y in np.array(self.blocks).astype(int):
            screen[max(y - 4, 0) : y + 5, max(x - 2, 0) : max(x + 2, 0)] = GREEN
        screen[int(self.y) - 1 : int(self.y) + 1, PLAYER_X - 1 : PLAYER_X + 1] = 255
        return screen.repeat(8, 0).repeat(8, 1)


gym.register("PixelCopter-v0", PixelCopter, max_episode_steps=1000)
