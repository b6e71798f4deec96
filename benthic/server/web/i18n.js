// The words of the page, in English and Chinese.

export const WORDS = {
  en: {
    skip: "Skip to the message field", conversations: "Conversations", new: "New conversation", close: "Close",
    settings: "Settings", help: "Shortcuts", welcome: "What is on your mind?",
    privacy: "Conversations stay in this browser. The server keeps nothing.", messages: "Messages",
    bottom: "Go to the end", prompt: "Message", think: "Think", send: "Send", stop: "Stop",
    note: "Answers can be wrong. Check what matters.", thisChat: "This conversation", system: "System prompt",
    systemHint: "How the model should answer", temperature: "Temperature", maxTokens: "Longest answer", seed: "Seed",
    random: "random", defaults: "Back to defaults", access: "Access", key: "API key", connect: "Connect",
    keyHint: "Kept until this tab is closed, and sent to this server only.", page: "Page", language: "Language",
    automatic: "Automatic", exportAll: "Export all", import: "Import", clear: "Delete all", greedy: "greedy", all: "all",
    context: "the context", tokens: "{n} tokens", used: "{n} conversations, {size} in this browser",
    thinking: "Thinking", thinkingFor: "Thinking for {time}", thought: "Thought for {time}", thoughtSome: "Thoughts",
    copy: "Copy", copied: "Copied", again: "Answer again", edit: "Edit", rename: "Rename", delete: "Delete",
    export: "Export", cancel: "Cancel", save: "Send", retry: "Try again", you: "You", model: "Model",
    untitled: "New conversation", deleted: "Deleted", undo: "Undo", answering: "Answering", answered: "Answer complete",
    stopped: "Stopped", cut: "The longest answer was reached", perSecond: "{n} tokens/s", first: "first after {time}",
    accepted: "{n} of drafts accepted", cached: "{n} cached", milliseconds: "{n} ms", seconds: "{n} s", minutes: "{m} min {s} s",
    lost: "The connection was lost", broken: "The answer broke off", needKey: "This server asks for an API key", wrongKey: "The server does not know this API key",
    empty: "The model said nothing", full: "The browser's storage for this page is full: export and delete conversations",
    unsaved: "This browser keeps nothing for this page: conversations are lost when it is closed",
    imported: "{n} conversations imported", notImported: "Not imported: {why}", cleared: "All conversations deleted",
    notJson: "the file is not JSON", notOurs: "the file holds no conversations", tooLarge: "the file is too large",
    badMessage: "message {m} of conversation {n} is not readable", code: "Code", offline: "The server does not answer",
    kSend: "Send", kLine: "New line", kStop: "Stop the answer, close a panel", kNew: "New conversation",
    kAgain: "Answer again", kSettings: "Settings", kThink: "Thinking on or off", kCopy: "Copy the last answer",
    kMove: "Next or previous conversation", kFocus: "Go to the message field", kEdit: "Edit the last message (field empty)",
    kHelp: "This list",
  },
  zh: {
    skip: "跳到输入框", conversations: "对话", new: "新对话", close: "关闭",
    settings: "设置", help: "快捷键", welcome: "想聊点什么？",
    privacy: "对话只保存在此浏览器中，服务器不留存任何内容。", messages: "消息",
    bottom: "回到底部", prompt: "输入消息", think: "思考", send: "发送", stop: "停止",
    note: "回答可能有误，重要内容请核实。", thisChat: "本次对话", system: "系统提示词",
    systemHint: "希望模型如何回答", temperature: "温度", maxTokens: "最长回答", seed: "随机种子",
    random: "随机", defaults: "恢复默认", access: "访问", key: "API 密钥", connect: "连接",
    keyHint: "关闭标签页后即清除，且只发送给本服务器。", page: "页面", language: "语言",
    automatic: "自动", exportAll: "导出全部", import: "导入", clear: "全部删除", greedy: "贪心", all: "全部",
    context: "上下文上限", tokens: "{n} 个词元", used: "此浏览器中有 {n} 个对话，共 {size}",
    thinking: "思考中", thinkingFor: "已思考 {time}", thought: "思考了 {time}", thoughtSome: "思考过程",
    copy: "复制", copied: "已复制", again: "重新回答", edit: "编辑", rename: "重命名", delete: "删除",
    export: "导出", cancel: "取消", save: "发送", retry: "重试", you: "你", model: "模型",
    untitled: "新对话", deleted: "已删除", undo: "撤销", answering: "正在回答", answered: "回答完成",
    stopped: "已停止", cut: "已达到最长回答", perSecond: "{n} 词元/秒", first: "首字 {time}",
    accepted: "草稿接受率 {n}", cached: "缓存命中 {n}", milliseconds: "{n} 毫秒", seconds: "{n} 秒", minutes: "{m} 分 {s} 秒",
    lost: "连接已断开", broken: "回答中断了", needKey: "此服务器需要 API 密钥", wrongKey: "服务器不接受此 API 密钥",
    empty: "模型没有回答", full: "浏览器为此页面提供的空间已满：请导出并删除一些对话",
    unsaved: "此浏览器不为本页面保存数据：关闭后对话将丢失",
    imported: "已导入 {n} 个对话", notImported: "未导入：{why}", cleared: "已删除全部对话",
    notJson: "文件不是 JSON", notOurs: "文件中没有对话", tooLarge: "文件过大",
    badMessage: "第 {n} 个对话的第 {m} 条消息无法读取", code: "代码", offline: "服务器没有响应",
    kSend: "发送", kLine: "换行", kStop: "停止回答，关闭面板", kNew: "新对话",
    kAgain: "重新回答", kSettings: "设置", kThink: "开关思考", kCopy: "复制最后的回答",
    kMove: "下一个或上一个对话", kFocus: "跳到输入框", kEdit: "编辑上一条消息（输入框为空时）",
    kHelp: "显示本列表",
  },
};

const chosen = () => localStorage.getItem("language") ?? "";
let words = WORDS.en;

/** The text of `key`, with `{name}` replaced by what `values` holds. */
export function t(key, values = {}) {
  return words[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Take the chosen language, else the browser's, and write it into the page. */
export function speak(language = chosen()) {
  if (language) localStorage.setItem("language", language);
  else localStorage.removeItem("language");
  const spoken = language || ((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");
  words = WORDS[spoken] ?? WORDS.en;
  document.documentElement.lang = spoken === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-label]")) {
    node.ariaLabel = t(node.dataset.label);
    if (node.matches("button")) node.title = node.ariaLabel;
  }
  for (const node of document.querySelectorAll("[data-place]")) node.placeholder = t(node.dataset.place);
  return chosen();
}

/** A duration as people say it. */
export function time(milliseconds) {
  if (milliseconds < 950) return t("milliseconds", { n: Math.round(milliseconds) });
  const seconds = milliseconds / 1000;
  if (seconds < 60) return t("seconds", { n: seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds) });
  return t("minutes", { m: Math.floor(seconds / 60), s: Math.floor(seconds % 60) });
}
