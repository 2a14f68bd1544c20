# fish completion of qlora

function __qlora_complete
  set -l before (commandline -opc)
  set -l word (commandline -ct)
  if string match -q -- --config-dir $before[-1]
    __fish_complete_directories "$word"
  else if string match -q -- '*=*' $word
    set -l parts (string split -m 1 = -- $word)
    set -l values (__qlora_values "$before[2]:$parts[1]")
    contains -- @ $values; and set -a values (__fish_complete_path "$parts[2]")
    string match -v -- @ $values | string replace -r '^' "$parts[1]="
  else
    set -l words (__qlora_words "$before[2]")
    contains -- @ $words; and set -a words (__fish_complete_path "$word")
    string match -v -- @ $words
  end
end
complete -c qlora -f -a '(__qlora_complete)'
