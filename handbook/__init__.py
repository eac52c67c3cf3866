"""文档的网站：从代码生成参考页与 llms.txt，把 docs/ 的页面摆成中英两份，由 Zensical 建成网站。"""
