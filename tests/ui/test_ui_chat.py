"""What a person does with the page."""

import json

from browse import done, ready, until

RICH = """# Title

Some **bold** text with $x^2$.

```python
def f(x):
    return x < 1
```

1. one
2. two

| a | b |
|---|---|
| 1 | 2 |
"""


def test_an_answer_streams_and_ends_rendered(server, visit, ask):
    page = visit(server)
    server.say(RICH, pause=0.001)
    answer = ask(page)
    assert answer.locator(".body h1").inner_text() == "Title"
    assert answer.locator(".body strong").inner_text() == "bold"
    assert answer.locator(".body math msup").count() == 1
    assert answer.locator(".body pre .hl-k").first.inner_text() == "def"
    assert answer.locator(".body li").all_inner_texts() == ["one", "two"]
    assert answer.locator(".body td").all_inner_texts() == ["1", "2"]
    numbers = answer.locator(".numbers").inner_text()
    assert "tokens/s" in numbers
    assert f"{len(server.engine.script)} tokens" in numbers
    assert page.locator("#live").inner_text() == "Answer complete"
    assert page.title() == "hello · Benthic"


def test_finished_blocks_are_rendered_while_the_last_one_is_plain(server, visit):
    page = visit(server)
    server.say("**first**\n\n**second** and more " + "words " * 40, pause=0.01)
    page.fill("#prompt", "go")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".body strong")
    assert page.locator(".body strong").all_inner_texts() == ["first"]
    until(page, "document.querySelector('.plain').innerText.startsWith('**second**')")
    assert page.locator(".coming .numbers").inner_text()
    done(page)
    assert page.locator(".body strong").all_inner_texts() == ["first", "second"]


def test_rendering_asks_for_each_block_once_and_for_the_whole_at_the_end(server, visit, ask):
    page, sent = visit(server), []
    page.on("request", lambda request: sent.append(request.post_data) if request.url.endswith("/render") else None)
    text = "\n\n".join(f"paragraph {n} *with* text" for n in range(60))
    server.say(text, pause=0.0005)
    answer = ask(page)
    assert answer.locator(".body em").count() == 60
    sizes = [len(text) for body in sent for text in json.loads(body)["texts"]]
    assert len(sizes) > 3
    assert sum(sizes) <= 2 * len(text) + 10


def test_nothing_jumps_while_an_answer_streams(server, visit, ask):
    page = visit(server)
    page.evaluate("""() => { window.shift = 0; new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) window.shift += entry.value;
    }).observe({type: "layout-shift", buffered: false}); }""")
    server.say(RICH * 4, pause=0.001)
    ask(page)
    assert page.evaluate("window.shift") < 0.1
    page.evaluate("document.querySelector('#messages').style.marginTop = '300px'")
    until(page, "window.shift > 0.1")  # the measure finds what does jump


def test_thoughts_fold_with_their_time_and_stay_as_the_user_left_them(server, visit, ask):
    page = visit(server)
    server.say("yes", thoughts="**deep** thought", pause=0.01)
    answer = ask(page)
    summary = answer.locator("summary")
    assert summary.inner_text().startswith("Thought for ")
    assert not answer.locator("details").evaluate("node => node.open")
    assert answer.locator(".thoughts .body").inner_html() == ""  # what is folded costs nothing
    summary.click()
    assert answer.locator(".thoughts strong").inner_text() == "deep"
    assert answer.locator(":scope > .body").inner_text() == "yes"
    answer = ask(page, "again")
    assert answer.locator("details").evaluate("node => node.open")


def test_stop_keeps_what_was_said_and_frees_the_engine(server, visit):
    page = visit(server)
    server.say("word " * 2000, pause=0.005)
    aborted = server.engine.counts["aborted"]
    page.fill("#prompt", "go")
    page.press("#prompt", "Enter")
    until(page, "document.querySelector('.assistant .body').innerText.length > 20")
    page.click("#stop")
    done(page)
    answer = page.locator(".assistant")
    assert "Stopped" in answer.locator(".numbers").inner_text()
    assert answer.locator(".body").inner_text().startswith("word word")
    page.wait_for_timeout(300)
    assert server.engine.counts["aborted"] == aborted + 1
    assert not server.engine.running


def test_an_answer_is_given_again_in_place_of_the_old_one(server, visit, ask):
    page = visit(server)
    server.say("first")
    ask(page)
    server.say("second")
    page.locator(".assistant [data-action=again]").click()
    until(page, "document.querySelector('.assistant .body').innerText.includes('second')")
    assert page.locator("#messages > li").count() == 2
    assert server.heard().count("hello") == 1


def test_an_edited_message_replaces_what_came_after(server, visit, ask):
    page = visit(server)
    server.say("ok")
    ask(page, "one")
    ask(page, "two")
    page.locator(".user").first.hover()
    page.locator(".user [data-action=edit]").first.click()
    page.fill(".editor", "changed")
    page.press(".editor", "Enter")
    done(page)
    assert page.locator(".bubble").all_inner_texts() == ["changed"]
    assert "changed" in server.heard()
    assert "one" not in server.heard()


def test_an_error_is_shown_and_can_be_tried_again(server, visit, ask):
    page = visit(server)
    server.say("fine")
    server.engine.broken = RuntimeError("no")
    answer = ask(page)
    assert "engine failed" in answer.locator(".trouble").inner_text()
    answer.locator(".trouble button").click()
    until(page, "document.querySelector('.assistant .body').innerText.includes('fine')")
    assert page.locator(".trouble").is_hidden()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    assert "does not answer" in ask(page).locator(".trouble").inner_text()


def test_settings_reach_the_engine_and_the_next_conversation(server, visit, ask):
    page = visit(server)
    page.press("#prompt", "Alt+KeyS")
    page.fill("#system", "Answer in verse.")
    page.fill("#temperature", "0.35")
    page.fill("#top_p", "0.8")
    page.fill("#top_k", "40")
    page.fill("#max_tokens", "2")
    page.fill("#seed", "12x3")
    assert page.locator("output[for=max_tokens]").inner_text() == "64 tokens"
    page.keyboard.press("Escape")
    server.say("ok")
    ask(page)
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (0.35, 0.8, 40)
    assert (params.max_tokens, params.seed) == (64, 123)
    assert "Answer in verse." in server.heard()
    page.reload()
    ask(page)
    assert "Answer in verse." in server.heard()
    page.press("#prompt", "Alt+KeyS")
    page.click("#defaults")
    page.keyboard.press("Escape")
    ask(page)
    assert server.engine.requests[-1].params.temperature == 0.6
    assert "Answer in verse." not in server.heard()


def test_conversations_are_kept_renamed_deleted_and_brought_back(server, visit, ask):
    page = visit(server)
    server.say("**one**")
    ask(page, "first")
    page.click("#new")
    ask(page, "second")
    titles = page.locator("#list .title")
    assert titles.all_inner_texts() == ["second", "first"]
    titles.nth(1).focus()
    page.keyboard.press("F2")
    page.fill(".rename", "renamed")
    page.keyboard.press("Enter")
    page.reload()
    ready(page)
    assert titles.all_inner_texts() == ["renamed", "second"]
    titles.nth(0).click()
    assert page.locator(".bubble").inner_text() == "first"
    assert page.locator(".body strong").inner_text() == "one"
    titles.nth(0).press("Delete")
    assert titles.all_inner_texts() == ["second"]
    page.click("#toast-action")
    until(page, "document.querySelectorAll('#list .title').length === 2")


def test_an_answer_goes_on_while_another_conversation_is_open(server, visit, ask):
    page = visit(server)
    server.say("long " * 60, pause=0.01)
    page.fill("#prompt", "first")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".assistant .body .plain")
    page.click("#new")
    assert page.locator("#messages > li").count() == 0
    assert page.locator("#stop").is_hidden()
    page.locator("#list .title").click()
    assert page.locator("#stop").is_visible()
    done(page)
    assert page.locator(".assistant .body").inner_text().split() == ["long"] * 60


def test_export_and_import_carry_conversations_to_another_browser(server, visit, ask, tmp_path):
    page = visit(server)
    server.say("**text**", thoughts="why")
    ask(page, "question")
    page.press("#prompt", "Alt+KeyS")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    assert json.loads(file.read_text("utf-8"))["format"] == "benthic-conversations"
    other = visit(server)
    other.set_input_files("#file", file)
    other.locator("#list .title").click()
    assert other.locator(".bubble").inner_text() == "question"
    assert other.locator("#messages .body strong").inner_text() == "text"
    for wrong in ("no json", "[]", '{"format": "benthic-conversations", "conversations": [{"messages": [{}]}]}'):
        file.write_text(wrong, "utf-8")
        other.set_input_files("#file", file)
        until(other, "document.querySelector('#toast').innerText.startsWith('Not imported')")
    assert other.locator("#list .title").count() == 1
    other.press("#prompt", "Alt+KeyS")
    other.click("#clear")
    assert other.locator("#list .title").count() == 0
    other.click("#toast-action")  # it can be reached while the panel is open
    until(other, "document.querySelectorAll('#list .title').length === 1")


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(server, visit):
    page = visit(server)
    server.say("word " * 2000, pause=0.005)
    page.fill("#prompt", "go")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".assistant .plain")
    page.locator("#list .title").press("Delete")
    page.wait_for_timeout(300)
    assert page.locator("#list .title").count() == 0
    assert not server.engine.running
    page.reload()
    ready(page)
    assert page.locator("#list .title").count() == 0


def test_a_key_is_asked_for_and_kept_for_the_tab_only(launch, visit, ask):
    server = launch(key="sk-right")
    page = visit(server)
    assert page.locator("#key").evaluate("node => node === document.activeElement")
    page.fill("#key", "sk-right")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#model').innerText === 'tiny'")
    server.say("in")
    assert ask(page).locator(".body").inner_text() == "in"
    assert page.evaluate("sessionStorage.getItem('key')") == "sk-right"
    kept = page.evaluate("""async () => {
        const open = indexedDB.open("benthic");
        await new Promise((resolve) => (open.onsuccess = resolve));
        const all = open.result.transaction("conversations").objectStore("conversations").getAll();
        await new Promise((resolve) => (all.onsuccess = resolve));
        return JSON.stringify([all.result, {...localStorage}, document.cookie]);
    }""")
    assert "hello" in kept
    assert "sk-right" not in kept


def test_thinking_is_switched_where_the_template_has_the_choice(server, launch, tokenizer, visit, ask):
    assert visit(server).locator("#think").is_hidden()
    knows = launch(tokenizer.with_template("v3.1"))
    page = visit(knows)
    knows.say("ok")
    page.click("#think")
    ask(page)
    assert knows.engine.requests[-1].prompt_token_ids[-1] == tokenizer.special["<think>"]
    page.press("#prompt", "Alt+KeyT")
    assert page.locator("#think").get_attribute("aria-pressed") == "false"
    ask(page)
    assert knows.engine.requests[-1].prompt_token_ids[-1] == tokenizer.special["</think>"]


def test_numbers_come_from_the_usage(server, visit):
    page = visit(server)
    usage = {
        "completion_tokens": 101,
        "completion_tokens_details": {
            "reasoning_tokens": 40, "accepted_prediction_tokens": 30, "rejected_prediction_tokens": 10,
        },
        "prompt_tokens_details": {"cached_tokens": 64},
    }  # fmt: skip
    times = {"start": 1000, "first": 1500, "thought": 1500, "content": 2500, "last": 3500}
    measured = "([usage, times]) => import('/web/message.js').then((module) => module.measure(usage, times))"
    stats = page.evaluate(measured, [usage, times])
    assert stats == {
        "first": 500, "took": 1000, "tokens": 101, "rate": 50, "thoughts": 40, "acceptance": 0.75, "cached": 64,
    }  # fmt: skip


def test_code_is_copied(server, visit, ask):
    page = visit(server)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.say("```python\nx = 1 < 2\n```")
    answer = ask(page)
    answer.locator(".code .copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1 < 2\n"
    answer.locator("[data-action=copy]").click()
    page.wait_for_timeout(100)
    assert page.evaluate("navigator.clipboard.readText()").startswith("```python")
