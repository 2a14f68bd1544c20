#compdef qlora

_qlora() {
  local word=$PREFIX verb=$words[2]
  local -a found
  if [[ $words[CURRENT-1] == --config-dir ]]; then
    _files -/
    return
  fi
  if [[ $word == *=* ]]; then
    found=(${(f)"$(__qlora_values "$verb:${word%%=*}")"})
    compset -P "${word%%=*}="
  else
    (( CURRENT == 2 )) && verb=
    found=(${(f)"$(__qlora_words "$verb")"})
  fi
  compadd -S '' -- ${(M)found:#*=}
  compadd -- ${${found:#*=}:#@}
  [[ -n ${found[(r)@]} ]] && _files
}
if [[ $funcstack[1] == _qlora ]]; then
  _qlora "$@"
else
  compdef _qlora qlora
fi
