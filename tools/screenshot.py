"""Pictures of pages for the docs, by a browser without a screen."""

import pathlib
import shutil
import subprocess
import tempfile


def find_browser() -> str | None:
    """The path of Chromium or Chrome; None where there is neither."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def take_screenshot(browser: str, address: str, picture: pathlib.Path, window_size: str, *options: str) -> None:
    """Write a picture of what a page shows.

    Args:
        browser: its path.
        address: the page's URL.
        picture: the PNG, overwritten.
        window_size: pixels, as ``width,height``.
        options: more of the browser's.

    """
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={window_size}", f"--screenshot={picture}", *options]
        subprocess.run([*command, address], check=True, capture_output=True, timeout=180)
