"""The page of a selection as a browser draws it: a headless Chromium, told by a script in the page what to do."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

import cacovid_kernels as ck

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from cacovid_kernels.viz import heat_colours, report  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (Debian: apt install chromium)")

GRID = (8, 6, 6)
DIM = np.array([0x14, 0x16, 0x1B])
HELPERS = """
const all = query => [...document.querySelectorAll(query)];
const move = (id, value) => {
  const input = document.getElementById(id);
  input.value = value;
  input.dispatchEvent(new Event("input"));
};
const text = id => document.getElementById(id).textContent;
const kept = (h, w) => all("path.dim").map(path => Array.from({length: h * w}, (_, i) =>
  Number(!path.isPointInFill(new DOMPoint(i % w + .5, Math.floor(i / w) + .5))))).flat();
const pictures = () => all(".picture").map(picture => {
  const box = picture.getBoundingClientRect();
  return [box.left, box.top, box.width, box.height];
});
"""


@pytest.fixture
def browse(tmp_path):
    def visit(page, script, size=(1280, 1000)):
        """What the body of an async function returns in the page, and the picture that is then on the screen."""
        run = f"""<script>
          const faults = [];
          addEventListener("error", event => faults.push(event.message));
          addEventListener("load", async () => {{
            let found = null;
            try {{
              found = await (async () => {{ {HELPERS} {script} }})();
            }} catch (error) {{
              faults.push(String(error));
            }}
            document.documentElement.dataset.found = JSON.stringify({{found, faults}});
          }});</script>"""
        (tmp_path / "page.html").write_text(page.replace("<head>", "<head>" + run), encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
        command += ["--force-prefers-reduced-motion", "--force-device-scale-factor=1", "--virtual-time-budget=5000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size[0]},{size[1]}"]
        command += [f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        answer = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
        assert answer["faults"] == []
        return answer["found"], np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)

    return visit


def flat_frames(count=GRID[0]):
    """Every frame of a colour of its own."""
    colours = np.stack([np.linspace(120, 240, count), np.linspace(230, 130, count), np.full(count, 180)], -1)
    return np.broadcast_to(colours.round().astype(np.uint8)[:, None, None], (count, 90, 160, 3))


def centres(screen, boxes, grid):
    """The colour in the middle of every token: `[t, h, w, 3]`."""
    _, h, w = grid
    found = np.empty((*grid, 3), int)
    for t, (left, top, width, height) in enumerate(boxes):
        rows = (top + (np.arange(h) + 0.5) * height / h).astype(int)
        columns = (left + (np.arange(w) + 0.5) * width / w).astype(int)
        found[t] = screen[rows[:, None], columns]
    return found


def odd_scores():
    """Ties, both zeros, infinities and NaN among scores of two decimals."""
    scores = (torch.randn(GRID, generator=torch.Generator().manual_seed(0)) * 4).round() / 4
    flat = scores.view(-1)
    flat[::31], flat[5::43], flat[7::47], flat[3::29] = float("nan"), float("-inf"), float("inf"), -0.0
    return scores.view(GRID[0], -1)


def topk(scores, ratio, grid=GRID):
    return ck.topk_tokens(scores, [grid], keep_ratio=ratio).mask().reshape(grid).numpy()


def assert_drawn(screen, boxes, mask, frames):
    bright = frames[:, :1, :1].astype(int)
    expected = np.where(mask[..., None], bright, 0.36 * bright + 0.64 * DIM)
    assert np.abs(centres(screen, boxes, mask.shape) - expected).max() <= 4


@pytest.mark.parametrize("grid, size", [(GRID, (1280, 1000)), (GRID, (520, 1400)), ((40, 14, 14), (1280, 2000))])
def test_kept_tokens_are_bright_and_dropped_ones_dim(browse, grid, size):
    mask = np.random.default_rng(0).random(grid) < 0.3
    frames = flat_frames(grid[0])
    found, screen = browse(
        report(frames, mask), "return [pictures(), document.documentElement.scrollWidth, text('kept')];", size
    )
    assert_drawn(screen, found[0], mask, frames)
    assert found[1] == size[0]  # nothing is wider than the screen
    assert found[2] == f"{mask.sum():,} of {mask.size:,} ({mask.mean():.1%})"


def test_the_slider_keeps_what_topk_keeps(browse):
    scores, frames = odd_scores(), flat_frames()
    given = ck.select_tokens(scores, None, [GRID], keep_ratio=0.2)
    steps = [*range(1, 12), *range(30, 1000, 61), 290, 580, 1000, 123]  # 290 / 1000 * 288 rounds down
    script = f"""
      const before = kept(6, 6), seen = [];
      for (const step of {steps}) {{
        move("slider", step);
        seen.push([kept(6, 6), all("figcaption b").map(b => b.textContent)]);
      }}
      document.getElementById("back").click();
      const after = kept(6, 6), value = document.getElementById("slider").value;
      move("slider", {steps[-1]});
      return [before, seen, after, value, pictures()];"""
    (before, seen, after, value, boxes), screen = browse(report(frames, given, scores), script)
    assert before == after == given.mask().int().tolist()
    assert value == str(round(1000 * sum(given.lengths) / 288))
    for step, (cells, captions) in zip(steps, seen, strict=True):
        mask = topk(scores, step / 1000)
        assert cells == mask.ravel().astype(int).tolist(), step
        assert captions == [f"{n} kept" for n in mask.sum((1, 2))]
    assert_drawn(screen, boxes, topk(scores, steps[-1] / 1000), frames)


def test_every_ratio_counts_as_topk_counts(browse):
    grid = (5, 6, 10)  # the order of the product decides the count of 13 of the 1000 ratios
    scores = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    script = """const seen = [];
      for (let step = 1; step <= 1000; step++) { move("slider", step); seen.push(parseInt(text("kept"))); }
      return seen;"""
    seen, _ = browse(report(flat_frames(5), topk(scores, 0.1, grid), scores), script)
    assert seen == [sum(ck.topk_tokens(scores, [grid], keep_ratio=step / 1000).lengths) for step in range(1, 1001)]


def test_a_list_of_selections_is_shown_as_it_is(browse):
    scores = odd_scores()
    given = [ck.select_tokens(scores, None, [GRID], keep_ratio=ratio) for ratio in (0.25, 0.1, 0.5)]
    script = """const slider = document.getElementById("slider"), seen = [[slider.value, kept(6, 6)]];
      for (const place of [0, 1, 2]) { move("slider", place); seen.push([slider.value, kept(6, 6)]); }
      return seen;"""
    seen, _ = browse(report(flat_frames(), given, scores), script)
    masks = [one.mask().int().tolist() for one in given]
    assert seen == [["1", masks[0]], ["0", masks[1]], ["1", masks[0]], ["2", masks[2]]]


def test_heat_covers_the_frames_with_the_colours_of_the_scores(browse):
    scores = torch.linspace(0, 1, 288).reshape(8, 36)[:, torch.randperm(36, generator=torch.Generator().manual_seed(0))]
    page = report(flat_frames(), topk(scores, 0.1), scores)
    boxes, screen = browse(page, "move('heat', 100); return pictures();")
    low, high = np.percentile(scores, (1, 99))
    expected = heat_colours(((scores.numpy() - low) / (high - low)).reshape(GRID))
    assert np.abs(centres(screen, boxes, GRID) - expected).max() <= 2


def test_bars_lead_to_frames(browse):
    grid = (60, 4, 4)
    mask = np.zeros(grid, bool)
    for t in range(60):
        mask.reshape(60, 16)[t, : t % 9] = True
    script = """
      const bars = all(".bars button"), frames = all("figure");
      const tall = bars.map(bar => parseFloat(getComputedStyle(bar, "::after").height));
      const seen = () => frames.map((frame, t) => frame.hasAttribute("aria-current") ? t : -1).filter(t => t >= 0);
      const stops = () => bars.map((bar, t) => bar.tabIndex === 0 ? t : -1).filter(t => t >= 0);
      const sight = t => {
        const box = frames[t].getBoundingClientRect(), top = all(".timeline")[0].getBoundingClientRect();
        return top.top >= 0 && box.top >= top.bottom && box.bottom <= innerHeight;
      };
      bars[50].click();
      const clicked = [seen(), stops(), sight(50), scrollY > 0];
      bars[50].focus();
      const key = name =>
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
      key("ArrowRight");
      const right = [seen(), stops(), sight(51)];
      key("Home");
      return {tall, clicked, right, home: [seen(), stops(), sight(0)], label: bars[7].getAttribute("aria-label")};"""
    seconds = [0.5 * t for t in range(60)]
    found, _ = browse(report(flat_frames(60), mask, timestamps=seconds), script, (1000, 800))
    assert np.allclose(np.array(found["tall"]) / max(found["tall"]), np.arange(60) % 9 / 8, atol=0.01)
    assert found["clicked"] == [[50], [50], True, True]
    assert found["right"] == [[51], [51], True]
    assert found["home"] == [[0], [0], True]
    assert found["label"] == "frame 7, 3.50 s: 7 of 16 tokens kept"


def test_texts_are_shown_as_texts(browse):
    question = "</script><script>document.title = 'taken'</script> \"quoted\" & 'so' <b>?"
    page = report(flat_frames(), np.ones(GRID, bool), title="<i>A</i> & B", question=question, answers={"<u>": "</dl>"})
    script = "return [text('question'), text('answers'), all('h1')[0].textContent, document.title];"
    found, _ = browse(page, script)
    assert found == [question, "<u></dl>", "<i>A</i> & B", "<i>A</i> & B"]


def test_without_scores_there_is_nothing_to_slide(browse):
    script = "return ['ratio', 'warmth'].map(id => document.getElementById(id).hidden);"
    page = report(flat_frames(), np.ones(GRID, bool))
    assert browse(page, script)[0] == [True, True]
