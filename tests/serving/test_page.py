"""The page in a real browser: headless Chromium, driven through chromedriver."""

import shutil

import numpy as np
import pytest
from PIL import Image
from running import serving
from tiny_models import LABELS, classifier_logits, scorer

pytestmark = pytest.mark.slow
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

PHONE, DESK = (390, 844), (1200, 900)


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def server(models):
    with serving(models["tiny"], models["bytes"], models["half"]) as server:
        yield server


@pytest.fixture
def page(browser, server):
    browser.set_window_size(*DESK)
    browser.get_log("browser")
    browser.get(server.url + "/")
    until(browser, lambda: find(browser, "#model").is_enabled() and find(browser, "#facts dd"))
    return browser


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def until(browser, condition):
    return WebDriverWait(browser, 10, 0.02, ignored_exceptions=(Exception,)).until(lambda _: condition())


def status(browser):
    return find(browser, "#status").text


def rows(browser):
    labels, shares = (browser.find_elements(By.CSS_SELECTOR, f"#answer {part}") for part in (".label", ".share"))
    return [(label.text, share.text) for label, share in zip(labels, shares, strict=True)]


def expected_rows(pixels):
    logits = classifier_logits(pixels[None])[0]
    shares = np.exp(logits) / np.exp(logits).sum()
    return [(LABELS[i], f"{100 * shares[i]:.1f} %") for i in np.argsort(-logits)]


def choose(browser, path):
    find(browser, "#file").send_keys(str(path))


def test_chosen_picture_gives_the_servers_answer(page, pixels, tmp_path):
    for number, picture in enumerate(pixels[:2]):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        choose(page, tmp_path / f"{number}.png")
        until(page, lambda picture=picture: rows(page) == expected_rows(picture))
        assert status(page).startswith("bytes: ") and " ms in the server" in status(page)
    meter = find(page, "#answer meter")
    assert meter.get_attribute("aria-label") == "{}: {}".format(*rows(page)[0])
    assert float(meter.get_attribute("value")) > 0
    assert "picture to be classified: 1.png" in find(page, "#preview").get_attribute("alt")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# The kind of the output, the operator that makes it, its width, labels, and the probabilities of the classes given its numbers.
KINDS = {
    "logits": (None, 5, LABELS, lambda sums: np.exp(sums) / np.exp(sums).sum()),
    "probabilities": ("Softmax", 5, LABELS, lambda sums: np.exp(sums) / np.exp(sums).sum()),
    "multilabel": ("Sigmoid", 5, LABELS, sigmoid),
    "binary": ("Sigmoid", 1, ["no", "yes"], lambda sums: np.array([1 - sigmoid(sums[0]), sigmoid(sums[0])])),
    "other": (None, 5, None, None),
}


def test_every_kind_of_output_is_shown_as_what_it_is(browser, pixels, tmp_path):
    files = [scorer(tmp_path / f"{kind}.onnx", kind, *entry[:3]) for kind, entry in KINDS.items()]
    files.append(scorer(tmp_path / "several.onnx", "multilabel", "Sigmoid", labels=LABELS, rows=("box",)))
    Image.fromarray(pixels[0]).save(tmp_path / "photo.png")
    sums = classifier_logits(pixels[:1])[0]
    with serving(*files) as server:
        browser.get(server.url + "/")
        until(browser, lambda: find(browser, "#model").is_enabled() and find(browser, "#facts dd"))
        for name, (_, units, labels, shares) in {**KINDS, "several": KINDS["multilabel"]}.items():
            Select(find(browser, "#model")).select_by_visible_text(name)
            choose(browser, tmp_path / "photo.png")
            if shares is None:
                until(browser, lambda: "declare it with --scores NAME --output-kind KIND" in status(browser))
                assert rows(browser) == []
                continue
            until(browser, lambda name=name: status(browser).startswith(f"{name}: "))
            found = shares(sums[:units])
            assert rows(browser) == [(labels[i], f"{100 * found[i]:.1f} %") for i in np.argsort(-found, kind="stable")]
            assert ("do not add up to 100 %" in status(browser)) == (labels is LABELS and shares is sigmoid)


def test_everything_is_reached_with_the_keyboard(page):
    def press(key):
        webdriver.ActionChains(page).send_keys(key).perform()
        return page.switch_to.active_element

    reached = []
    while "summary" not in reached:
        focused = press(Keys.TAB)
        reached.append(focused.get_attribute("id") or focused.tag_name)
        seen = find(page, "label[for=file]") if reached[-1] == "file" else focused
        assert seen.value_of_css_property("outline-style") == "solid", f"no visible focus on {reached[-1]}"
        if reached[-1] == "sample":
            press(Keys.ENTER)
            until(page, lambda: len(rows(page)) == 5)
    assert reached == ["model", "file", "sample", "summary"]
    press(Keys.ENTER)
    until(page, lambda: find(page, "#facts").is_displayed())


def test_switching_the_model_asks_again_and_shows_its_card(page):
    find(page, "#sample").click()
    until(page, lambda: status(page).startswith("bytes: "))
    model = Select(find(page, "#model"))
    assert [option.text for option in model.options] == ["bytes", "half", "tiny"]
    model.select_by_visible_text("tiny")
    until(page, lambda: status(page).startswith("tiny: "))
    find(page, "#card summary").click()
    facts = find(page, "#facts").text
    assert "8 × 8" in facts and "made up" in facts and "cpu" in facts


def test_mistakes_are_told(page, tmp_path):
    Select(find(page, "#model")).select_by_visible_text("half")
    find(page, "#sample").click()
    until(page, lambda: "does not take one batch of images" in status(page))
    assert rows(page) == [] and "wrong" in find(page, "#status").get_attribute("class")
    (tmp_path / "fake.png").write_bytes(b"no picture")
    Select(find(page, "#model")).select_by_visible_text("tiny")
    choose(page, tmp_path / "fake.png")
    until(page, lambda: "not an image" in status(page))


def test_page_fits_a_phone_and_loads_nothing_from_elsewhere(page, server):
    page.set_window_size(*PHONE)
    find(page, "#sample").click()
    until(page, lambda: len(rows(page)) == 5)
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    controls = [control for control in page.find_elements(By.CSS_SELECTOR, "button, .button, select") if control.is_displayed()]
    assert len(controls) == 3 and min(control.size["height"] for control in controls) >= 44
    names = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and all(name.startswith((server.url, "blob:" + server.url, "data:")) for name in names)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_key_is_asked_for(browser, models, tmp_path):
    (tmp_path / "keys").write_text("open sesame\n")
    with serving(models["tiny"], "--api-key-file", tmp_path / "keys") as server:
        browser.get(server.url + "/")
        until(browser, lambda: find(browser, "#key").is_displayed())
        find(browser, "#key").send_keys("wrong" + Keys.ENTER)
        until(browser, lambda: "API key is needed" in status(browser))
        find(browser, "#key").clear()
        find(browser, "#key").send_keys("open sesame" + Keys.ENTER)
        until(browser, lambda: find(browser, "#model").is_enabled())
        assert not find(browser, "#key-form").is_displayed()
        find(browser, "#sample").click()
        until(browser, lambda: len(rows(browser)) == 5)
