// The real text/template on the cases of tests/ollama_template_parity.py, with what Ollama hands to a template.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content, Thinking string }

type testCase struct {
	Template, System string
	Messages                []message
}

type result struct{ Text, Error string }

func run(one testCase) (string, error) {
	parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	err = parsed.Execute(&out, map[string]any{"System": one.System, "Messages": one.Messages, "Response": ""})
	return out.String(), err
}

func main() {
	var cases []testCase
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	results := make([]result, len(cases))
	for i, one := range cases {
		text, err := run(one)
		if err != nil {
			results[i].Error = err.Error()
		} else {
			results[i].Text = text
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		panic(err)
	}
}
