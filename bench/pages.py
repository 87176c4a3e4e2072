"""What drawing costs: real pages a second, and what the worst hostile page holds up.

    PYTHONPATH=.:tests python -m bench.pages COLBENCH-FRONTEND-TASKS.jsonl

Nothing is remembered: each page is drawn anew in each pass. On a busy machine pages that only just fit into their time
are drawn twice, or not at all; the table counts these.
"""
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from hostile_pages import hostile_pages

from env import load_tasks
from worlds import browser

PASSES = 5
DRAWER = browser.Browser()


def draw(source):
    """The page, and the seconds that it took, the start of a new browser included."""
    start = time.perf_counter()
    return DRAWER.draw_one(source, wanted=False), time.perf_counter() - start


def main():
    sources = [task.ground_truth for task in load_tasks(sys.argv[1])]
    print(f"load in the minute before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with ThreadPoolExecutor(browser.WORKERS) as pool:
        list(pool.map(draw, sources[:2 * browser.WORKERS]))  # both browsers have started
        for _ in range(PASSES):
            start = time.perf_counter()
            drawn = [page for page, _ in pool.map(draw, sources)]
            rate, missed = len(drawn) / (time.perf_counter() - start), sum(bool(page.failure) for page in drawn)
            print(f"{len(drawn)} real pages, {browser.WORKERS} workers: {rate:.1f} a second, {missed} not drawn")
    for number in range(PASSES):
        times = {name: draw(source)[1] for name, source in hostile_pages("127.0.0.1:9").items()}
        worst = sorted(times, key=times.get)[:-4:-1]
        print(f"{len(times)} hostile pages, pass {number + 1}, the slowest: "
              + ", ".join(f"{name} {times[name]:.1f} s" for name in worst), flush=True)


if __name__ == "__main__":
    main()
